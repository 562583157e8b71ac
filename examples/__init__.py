"""A real family of adapters to try everything on: two tasks, eight versions, one small base. See README.md."""
