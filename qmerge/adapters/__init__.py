"""Kinds of adapters, one file each. Tensors and config in, one ``Update`` per adapted module out.

A plug-in defines ``PEFT_TYPES`` (values of ``peft_type`` it takes) and
``updates(config, tensors) -> {module: (Update, [tensor names])}``. ``_folder.py`` reads the folder for all of them.
"""
