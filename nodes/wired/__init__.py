"""Training on the connected MODEL itself, of any family: the second kind of denoiser, see :mod:`.denoiser`."""
