"""safetensors files, and the lowest layer of the package: how files, temporary folders and threads are used anywhere in it.

header, reader, writer                    headers (strict), parts of tensors, a stream of tensors that is safe against crashes
disk, temporary, strict_json, threads     files that are whole or missing, folders and pools that nothing leaves behind
"""
