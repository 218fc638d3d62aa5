"""From a folder to samples: layouts, pairing, class tables, splits, cache and augmentation."""
