"""Types of tokens in a GGUF file (gguf.TokenType)."""

NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
UNUSED = 5
BYTE = 6
