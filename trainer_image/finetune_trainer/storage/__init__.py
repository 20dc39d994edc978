"""Every place outside the process: inputs are fetched from it, folders are committed to it."""
