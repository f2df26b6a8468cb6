"""Golden cases from reference implementations, see ../generate.py."""
