"""The compiled core: two libraries of one source, plain C to Python, which ctypes loads. Without a
compiler the package installs without it."""

import os
import sysconfig
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

UNIX = ["-O3", "-std=c++17", "-fopenmp-simd", "-fvisibility=hidden", "-fno-math-errno", "-pthread"]
MSVC = ["/O2", "/std:c++17"]
SUFFIX = ".dll" if os.name == "nt" else ".so"
FLAGS = {"_baseline": []}
if sysconfig.get_platform().endswith("x86_64"):  # not win-amd64, nor a Mac's two processors at once
    FLAGS["_x86_64_v3"] = ["-march=x86-64-v3"]


class Libraries(build_ext):
    """Not Python's modules: their files have plain names, and export what the source says."""

    def build_extension(self, ext):
        ext.extra_compile_args += MSVC if self.compiler.compiler_type == "msvc" else UNIX
        super().build_extension(ext)

    def copy_extensions_to_source(self):
        # of an editable install, in which nothing is left that does not compile any more
        for old in glob(f"convlayer/core/_*{SUFFIX}"):
            os.remove(old)
        super().copy_extensions_to_source()

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def get_ext_filename(self, fullname):
        return fullname.replace(".", os.sep) + SUFFIX


class AnyPython(bdist_wheel):
    """A wheel for the platform, and for every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            f"convlayer.core.{name}",
            ["convlayer/core/src/core.cpp"],
            depends=glob("convlayer/core/src/**/*.h*", recursive=True),
            extra_compile_args=flags,
            language="c++",
            optional=True,
        )
        for name, flags in FLAGS.items()
    ],
    cmdclass={"build_ext": Libraries, "bdist_wheel": AnyPython},
)
