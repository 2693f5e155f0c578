"""What generated kernels look like. Data only; read through `importlib.resources`."""
