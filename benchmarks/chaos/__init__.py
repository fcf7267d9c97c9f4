"""What happens when everything goes wrong."""
