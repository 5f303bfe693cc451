# make submit JOB=train    (which runs: python cluster/submit_job.py --address URL -- python pipelines/train.py)
"""Submit a command as a job, follow its log, end as it ended.

    python cluster/submit_job.py --address http://127.0.0.1:8265 -- python pipelines/train.py num_steps=100

This is `ray job submit --working-dir .` but for the end: Ray's own command ends with 1 whenever the job failed, this
one with the exit code of the job's command (2 bad setting, 3 too many failed rows). Ctrl-C leaves the log, not the job.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shlex
import sys
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
POLL_EVERY_S = 1.0


def main() -> int:
    """The exit code of the job's command; 1 if it never ran or was stopped, 2 if no cluster takes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="of the dashboard, such as http://127.0.0.1:8265")
    parser.add_argument("--no-follow", action="store_true", help="submit, print the job's name, and end with 0")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    arguments = parser.parse_args()
    words = arguments.command[arguments.command[:1] == ["--"] :]
    if not words:
        parser.error("no command; write it after --, such as: -- python pipelines/train.py")
    # Of each file that stays behind, Ray would say so.
    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(arguments.address)
        job = client.submit_job(entrypoint=shlex.join(words), runtime_env={"working_dir": str(ROOT)})
    except AuthenticationError:
        print(
            f"error: {arguments.address} takes jobs only with its token; set RAY_AUTH_MODE=token, and have "
            "the token in ~/.ray/auth_token, RAY_AUTH_TOKEN or the file that RAY_AUTH_TOKEN_PATH names",
            file=sys.stderr,
        )
        return 2
    except (ConnectionError, RuntimeError, ValueError) as error:
        print(f"error: {arguments.address} takes no job: {error}\nIs `make dashboard` open?", file=sys.stderr)
        return 2
    print(f"submitted {job}: {shlex.join(words)}", file=sys.stderr, flush=True)
    if arguments.no_follow:
        print(job)
        return 0
    try:
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        verbs = {verb: f"ray job {verb} --address {arguments.address} {job}" for verb in ("logs --follow", "stop")}
        print(f"\n{job} goes on; to see more or to end it:\n  " + "\n  ".join(verbs.values()), file=sys.stderr)
        return 1
    return report(client.get_job_info(job))


async def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the job's log as it grows, until the job ends."""
    try:
        async for part in client.tail_job_logs(job):
            print(part, end="", flush=True)
    except (RuntimeError, aiohttp.ClientError) as error:
        print(f"the log broke off ({error}); waiting for the job's end", file=sys.stderr, flush=True)
    while not client.get_job_status(job).is_terminal():
        await asyncio.sleep(POLL_EVERY_S)


def report(details: JobDetails) -> int:
    """Say how the job ended, and give the exit code for it."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code if details.status == JobStatus.FAILED else None
    said = f" with exit code {code}" if code is not None else f": {details.message or 'no reason is known'}"
    print(f"error: the job {details.status.lower()}{said}", file=sys.stderr)
    # A shell's code for a command that a signal ended; Ray gives what subprocess does.
    return 1 if code is None else (code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main())
