"""The science of Vitrine: tensors in, tensors out. No files, no network, no orchestration, no store."""
