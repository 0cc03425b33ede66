"""The core of gserve: configs, contracts, the lease, dispatch and the service. Read `interfaces` first."""
