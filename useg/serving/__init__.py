"""A model as a service, an exported file or a web page."""
