"""The object store of a site: S3 as moto's server speaks it, with what the site has in a bucket of the site's name.

Run at the site's host as ``reference_store.py ADDRESS SITE FOLDER``; it says "serving" when all of the folder is in the
bucket, and ends with its standard input. moto keeps the objects in memory.
"""

from __future__ import annotations

import os
import sys

import s3fs
from reference_calculations import STORE_PORT, store_options
from werkzeug.serving import WSGIRequestHandler


def main(address: str, site: str, folder: str) -> None:
    """Serve until standard input ends."""
    # The bucket is in the path, whatever the store's own name; moto reads this when it is imported.
    os.environ["S3_IGNORE_SUBDOMAIN_BUCKETNAME"] = "true"
    from moto.server import ThreadedMotoServer

    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # connections stay, as those of real stores do
    server = ThreadedMotoServer(ip_address=address, port=STORE_PORT, verbose=False)
    server.start()
    store = s3fs.S3FileSystem(**store_options(address))
    store.mkdir(site)
    store.put(f"{folder}/", site, recursive=True)
    print("serving", flush=True)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
