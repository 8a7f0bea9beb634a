"""The small base model and the sample subjects that ship with the pack; `making` holds what they were made with."""
