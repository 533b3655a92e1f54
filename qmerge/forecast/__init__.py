"""What is known before the first step: survival by target, the best target, warnings and the rounding to use."""
