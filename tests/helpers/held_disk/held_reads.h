/* Included before _pool.c: a disk that stops part way, for its threads as for os.preadv.

   A read that brings the bytes read so far above `after` waits inside what stands for the system
   call, until a file `open` appears in the folder `gate`; `reached` appears there when one waits. */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static char held_gate[4000];
static _Atomic int64_t held_after = INT64_MAX, held_nbytes;

void packcast_test_hold(const char *gate, int64_t after)
{
    snprintf(held_gate, sizeof held_gate, "%s", gate);
    atomic_store(&held_nbytes, 0);
    atomic_store(&held_after, after);
}

/* Count bytes that were read, and wait if that is too many. */
void packcast_test_count(int64_t nbytes)
{
    char name[sizeof held_gate + 16];
    struct timespec pause = {0, 10000000};
    if (atomic_fetch_add(&held_nbytes, nbytes) + nbytes <= atomic_load(&held_after))
        return;
    snprintf(name, sizeof name, "%s/open", held_gate);
    if (access(name, F_OK) == 0)
        return;
    snprintf(name, sizeof name, "%s/reached", held_gate);
    close(open(name, O_CREAT | O_WRONLY | O_CLOEXEC, 0666));
    snprintf(name, sizeof name, "%s/open", held_gate);
    while (access(name, F_OK) != 0)
        nanosleep(&pause, NULL);
}

static ssize_t held_pread(int fd, void *into, size_t nbytes, off_t offset)
{
    ssize_t got = pread(fd, into, nbytes, offset);
    if (got > 0)
        packcast_test_count(got);
    return got;
}

#define pread held_pread
