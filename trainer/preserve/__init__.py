"""Class preservation: methods that stop the model from forgetting the class."""
