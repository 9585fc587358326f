"""What a program does to a machine: floating-point operations, bytes moved."""
