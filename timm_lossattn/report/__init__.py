"""A whole data set explained: one parquet table and one static web page. Needs the ``report`` extra.

    data set --dataset--> images --collect--> shards --table--> report.parquet --summary, page--> index.html
"""
