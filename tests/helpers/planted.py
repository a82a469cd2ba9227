"""Secrets of many kinds, made up in the forms that their issuers document. Put together at run time, so that no
scanner of sources finds them here."""

ALNUM = "aB3dE5gH7jK9mN1pQ2sT4vW6xY8zA0bC1dE2fG3hJ4kL5mN6"
HEX = "0123456789abcdef" * 4

SECRETS = {
    "Hub": "hf" + "_" + ALNUM[:34],
    "Hub, organization": "api_org" + "_" + ALNUM[:34],
    "OpenAI": "sk-" + "proj-" + ALNUM,
    "OpenAI, old": "sk-" + ALNUM[:20] + "T3Blbk" + "FJ" + ALNUM[20:40],
    "Anthropic": "sk-" + "ant-api03-" + ALNUM,
    "DeepSeek": "sk-" + HEX[:32],
    "Groq": "gsk" + "_" + ALNUM,
    "xAI": "xai-" + ALNUM,
    "Replicate": "r8" + "_" + ALNUM[:37],
    "GitHub": "ghp" + "_" + ALNUM[:36],
    "GitHub, fine-grained": "github" + "_pat_" + ALNUM[:22] + "_" + ALNUM[:40],
    "GitLab": "glpat" + "-" + ALNUM[:20],
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "Google": "AIza" + ALNUM[:35],
    "Azure": "Account" + "Key=" + ALNUM + ALNUM[:38] + "==",
    "Databricks": "dapi" + HEX[:32],
    "Slack": "xoxb" + "-123456789012-" + ALNUM[:24],
    "Telegram": "123456789:" + "AA" + ALNUM[:33],
    "Stripe": "sk" + "_live_" + ALNUM[:24],
    "SendGrid": "SG." + ALNUM[:22] + "." + ALNUM[:43],
    "npm": "npm" + "_" + ALNUM[:36],
    "PyPI": "pypi-" + "AgEIcHlwaS5vcmc" + ALNUM + ALNUM,
    "web token": "eyJ" + ALNUM[:20] + ".eyJ" + ALNUM[:30] + "." + ALNUM[:40],
    "SSH": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
    "proxy": "http" + "://me:pass" + "word@proxy.example.org:8080",
    "W&B": "WANDB_API" + "_KEY=" + HEX[:40],
}
