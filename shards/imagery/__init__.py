"""Images decoded, resized and encoded; GeoTIFF bands and tiles."""
