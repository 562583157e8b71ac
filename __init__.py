"""adapterctl: register, merge, prove, evaluate and promote LoRA adapters, on top of MLflow.

Nothing is imported here, so that the command line starts at once and `import adapterctl` costs nothing.
"""

__version__ = "0.1.0"
