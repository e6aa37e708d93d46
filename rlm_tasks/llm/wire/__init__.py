"""OpenAI's wire format as providers really speak it: answers, errors and rate-limit headers.

`llm.endpoint` sends requests and reads responses with these modules.  Nothing here sends a request.
"""
