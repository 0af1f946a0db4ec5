// encode8 by look-up: two gathers where a search of the thresholds takes eight.
#pragma once

namespace peftk::PEFTK_TIER {

inline void encode8(const Nearest8& nearest, const F32 (&x)[kGroupVectors8], std::uint8_t* codes) {
  for (int i = 0; i < kGroupVectors8; i++) {
    const __m256 value = x[i].v;
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i upper = _mm256_srli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)), kBucketShift8);
    const __m256i above = _mm256_max_epi32(_mm256_sub_epi32(upper, _mm256_set1_epi32(kFirstBucket8)), _mm256_setzero_si256());
    const __m256i bucket = _mm256_min_epi32(above, _mm256_set1_epi32(kBuckets8 - 1));
    const __m256i side = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(kNegativeBuckets8));
    const __m256i four = _mm256_i32gather_epi32((const int*)nearest.below, _mm256_add_epi32(bucket, side), 1);
    const __m256i below = _mm256_and_si256(four, _mm256_set1_epi32(0xff));
    const __m256 threshold = _mm256_i32gather_ps(nearest.code->threshold, below, 4);
    const __m256i nearer = _mm256_castps_si256(_mm256_cmp_ps(value, threshold, _CMP_GT_OQ));
    const __m256i number = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_ORD_Q));
    store_bytes(codes + i * kLanes, {_mm256_and_si256(_mm256_sub_epi32(below, nearer), number)});
  }
}

}  // namespace peftk::PEFTK_TIER
