"""The labelling page: paint masks in a browser, with a model that learns meanwhile."""
