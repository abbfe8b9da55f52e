"""Bindings of kvk to other libraries. Each module imports its library; `import kvk` needs none of them."""
