"""Tables and pictures of networks on other images than their own test images."""
