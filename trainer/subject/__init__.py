"""The subject: its photos, captions and trigger words, and the checks on them."""
