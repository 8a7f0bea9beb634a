"""How the demo base was made and measured. Does not ship; nothing outside of tests imports it."""
