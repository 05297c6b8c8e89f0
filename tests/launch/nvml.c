/* NVML as far as it is asked: two GPUs, and a part of one. No CUDA context is made for it. */
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory;

static int started;

int nvmlInit_v2(void) { started++; return 0; }
int nvmlShutdown(void) { started--; return 0; }
int left_open(void) { return started; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    static const char *known[] = {"GPU-aa", "GPU-bb", "MIG-cc", "GPU-lost"};
    if (started != 1) return 1; /* NVML_ERROR_UNINITIALIZED */
    for (long i = 0; i < 4; i++)
        if (strcmp(uuid, known[i]) == 0) { *device = (void *)(i + 1); return 0; }
    return 6; /* NVML_ERROR_NOT_FOUND */
}

int nvmlDeviceGetMemoryInfo(void *device, memory *found) {
    long which = (long)device;
    if (which == 4) return 15; /* NVML_ERROR_GPU_IS_LOST */
    found->total = 80ull << 30;
    found->free = (unsigned long long)which * 10 << 30;
    found->used = found->total - found->free;
    return 0;
}
