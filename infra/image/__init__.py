"""What runs only in the image or while it is built: entry point, health check, its description."""
