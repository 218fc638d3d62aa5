"""The parts of a made street, in the order in which a seed becomes a picture: scenery, things, houses, layout, painting, light."""
