"""`finetune local` and `finetune check`: the same manifests without a cluster."""
