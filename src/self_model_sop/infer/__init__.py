"""From checkpoint to where it is used."""
