"""What runs below the operations: environment variables and the native module."""
