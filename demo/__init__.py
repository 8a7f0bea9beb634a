"""The small base model and the sample subjects that ship with the pack; `making` is the code that created them."""
