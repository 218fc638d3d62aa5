"""See the README's "How it is built" for what is where."""
