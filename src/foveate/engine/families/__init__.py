"""All that is known about model families: parts, placeholders, images in the prompt, order of patches."""
