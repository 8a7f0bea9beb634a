"""Code that trained and evaluated the demo base. It does not ship, and only tests import it."""
