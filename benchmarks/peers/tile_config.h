// gcc before 13 declares 8 of the 64 bytes that _tile_loadconfig reads, and drops the stores to the others: a program that
// fills the rest dies at its first AMX tile. Included ahead of every C++ file of a peer that is compiled here.
#pragma once
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(config)))
#endif
