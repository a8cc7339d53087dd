"""Model repositories in object stores: push and pull.

A store has no rename, so a folder cannot appear at once. Below the prefix lie

    MODEL/VERSION/...                     the files, as Triton reads them
    MODEL/config.pbtxt                    with the version policy spelt out: `specific` versions
    trtkit-claim.MODEL.VERSION.json       who may fill that version: the names and digests of its files
    trtkit-version.MODEL.VERSION.json     the same, written last: the version is complete

Every one of these JSON files is written on condition that it is not there, and never again. So of two that push one
version, the first claims it, and the other ends before it wrote a byte, unless it pushes the same: then either finishes
what the other began, and so does the next push after one that was killed.

What readers see: `pull` takes versions with the last file alone. A Triton that reads the bucket itself (s3://, gs://)
sees folders that are being filled, but serves what config.pbtxt lists, and that is one object, written after the
versions that it lists, on condition that it is still the one that was read. The files are in the root, where Triton
looks for folders only: inside a model they would count as changes of it.
"""

from __future__ import annotations

from trtkit.repository.remote.manifest import Manifest, manifest_of
from trtkit.repository.remote.pulling import pull
from trtkit.repository.remote.pushing import push
from trtkit.repository.remote.transfers import Transfer, VersionTransfer

__all__ = ["Manifest", "Transfer", "VersionTransfer", "manifest_of", "pull", "push"]
