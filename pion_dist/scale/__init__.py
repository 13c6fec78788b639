"""What an optimizer step costs at scale, predicted: ``python -m pion_dist.scale --help``."""
