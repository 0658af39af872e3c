"""The stages that train a judge, one short file each, over the loop that they share."""
