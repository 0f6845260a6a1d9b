"""A whole data set explained: one parquet table and one static web page. Needs the ``report`` extra.

    data set --dataset.py--> images --collect.py--> shards --table.py--> report.parquet --summary.py, page.py--> index.html
"""
