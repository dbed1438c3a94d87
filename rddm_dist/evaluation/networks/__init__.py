"""Networks that metrics look through: their architectures, their weight files and exported programs."""
