"""What has nothing to do with the method."""
