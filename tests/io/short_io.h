/* Included before _pool.c: system calls that are interrupted now and then, and move only a part. */

#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <errno.h>
#include <stdatomic.h>
#include <unistd.h>

static _Atomic unsigned num_calls;

static int is_interrupted(void)
{
    errno = EINTR;
    return atomic_fetch_add(&num_calls, 1) % 3 == 0;
}

static size_t shortened(size_t nbytes)
{
    return nbytes < 70001 ? nbytes : 70001;
}

static ssize_t short_pread(int fd, void *into, size_t nbytes, off_t offset)
{
    return is_interrupted() ? -1 : pread(fd, into, shortened(nbytes), offset);
}

static ssize_t short_pwrite(int fd, const void *from, size_t nbytes, off_t offset)
{
    return is_interrupted() ? -1 : pwrite(fd, from, shortened(nbytes), offset);
}

#define pread short_pread
#define pwrite short_pwrite
