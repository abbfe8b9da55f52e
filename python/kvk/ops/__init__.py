"""One module per op family: the public functions, their fakes (shapes without data) and gradients."""
