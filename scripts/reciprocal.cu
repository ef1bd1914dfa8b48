// Reads out how a GPU's approximate reciprocal differs from the correctly rounded one, for every
// f32 mantissa: the source of src/format/reciprocal.rs.
//
// nvcc -arch=sm_90 -use_fast_math scripts/reciprocal.cu -o reciprocal && ./reciprocal
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

__global__ void both(uint32_t exponent, uint32_t n, float *rounded, float *approximate) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        float x = __uint_as_float(exponent << 23 | i);
        rounded[i] = __frcp_rn(x);
        approximate[i] = 1.0f / x; // with -use_fast_math: rcp.approx.ftz.f32
    }
}

int main() {
    const uint32_t n = 1u << 23;
    float *device[2];
    std::vector<float> host[2];
    for (int k = 0; k < 2; k++) {
        cudaMalloc(&device[k], n * sizeof(float));
        host[k].resize(n);
    }
    std::vector<int> first;
    for (uint32_t exponent : {127u, 5u, 100u, 140u, 250u}) {
        both<<<n / 256, 256>>>(exponent, n, device[0], device[1]);
        for (int k = 0; k < 2; k++)
            cudaMemcpy(host[k].data(), device[k], n * sizeof(float), cudaMemcpyDeviceToHost);
        long counts[3] = {0, 0, 0};
        std::vector<int> steps(n);
        for (uint32_t i = 0; i < n; i++) {
            int32_t bits[2];
            for (int k = 0; k < 2; k++)
                memcpy(&bits[k], &host[k][i], 4);
            steps[i] = bits[1] - bits[0];
            if (steps[i] < -1 || steps[i] > 1) {
                printf("mantissa %06x: %d units in the last place\n", i, steps[i]);
                return 1;
            }
            counts[steps[i] + 1]++;
        }
        if (first.empty())
            first = steps;
        printf("// exponent %u: -1 %ld times, 0 %ld times, +1 %ld times%s\n", exponent, counts[0],
               counts[1], counts[2], steps == first ? "" : ", NOT as at exponent 127");
    }
    for (int word = 0; word < 64; word++) {
        uint32_t packed = 0;
        for (int k = 0; k < 16; k++)
            packed |= uint32_t(first[(word * 16 + k) << 13] + 1) << (2 * k);
        printf("0x%04x_%04x,%s", packed >> 16, packed & 0xffff, word % 6 == 5 ? "\n" : " ");
    }
    printf("\n");
}
