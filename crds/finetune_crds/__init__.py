"""The FineTuneJob API and every contract between operator and trainer; imports neither of them.

v1alpha1/       the API: pydantic models, the one source of the CRD, its reference page and `kubectl explain`
schema.py       models -> CustomResourceDefinition
resolution.py   a FineTuneJob's spec -> ResolvedJob: every default filled in, what the trainer reads
validation.py   the CRD's CEL rules, evaluated without an API server (`finetune local`)
locations.py    pvc://, s3://, https://, hf://, configmap:// URIs
progress.py     what a trainer POSTs and what it is answered
verdict.py      the final word of a run: termination message and its exit code
names.py        labels, annotations, mounts, environment, condition types, reasons
"""
