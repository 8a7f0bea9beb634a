"""The subject: photos, words, and what may be wrong with them."""
