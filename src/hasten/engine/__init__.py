"""Policy: which tokens run next. numpy only; knows no device beyond backends.base."""
